"""Cells that predict a box each, of which every object picks a few: YOLOX, YOLOv8 and their kin.

Four launches, five of SimOTA, and one that scales gradients where what comes from outside is not 1:

* ``decode``  boxes of all predictions, read once, from the middles of their cells; and fresh places for what follows.
  Of SimOTA also which cells are candidates.
* ``cost``    of SimOTA, what the true class does not change in the costs of candidates, some a program.
* ``pick``    a program a row: the best cells of its region, kept as it goes through these; and, should several rows
  pick one of them, a claim to each by how well it fits, a maximum by integer atomics. float64 claims are compared as
  float32.
* ``settle``  a program a row: the cells that it keeps, their soft scores; the last one sums the normaliser.
* ``loss``    class logits once, boxes where there is an object; loss and gradient.

Decisions compare floats, so all but the last are compiled without contraction of products and sums; whatever one of
them has computed another reads from memory, or computes by the same exact operations.
"""

"""The driver of anchor-grid heads: the only place that loads and stores their predictions.

A prediction map is ``[B, A, H, W, 5 + C]`` by strides, channels x, y, w, h, objectness, classes. A program owns CELLS
consecutive cells, a tile, of one image, level and anchor; all levels are one launch, and one body serves all of them.

Two launches. The loss launch (``loss``) first lists what its tile is assigned (``assign``), then settles objectness of
the whole tile, then the box and class loss of the listed predictions, many at a time (``positives``). It leaves partial
sums, which the last program to finish adds up in a fixed order, and, where a gradient will be asked for, what that
needs: two bits a prediction (BACKGROUND, IGNORED or ASSIGNED), the gradient of every assigned prediction, densely
packed, and where the packed ones of each program begin. The gradient launch (``gradient``) is then a stream of stores:
of a map it reads the objectness, of the loss launch the rest, of the target rows nothing.

A candidate is a row at one of the KINDS cells that it may take on a level. Those of one image are numbered by kind,
then by row; in this order they count where they share a prediction.
"""

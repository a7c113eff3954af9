"""The driver of heads over anchors that each predict a box and the logits of all classes: match, loss, rank."""

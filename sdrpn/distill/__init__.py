"""Self-distillation: the frozen model's own attention becomes labels, the labels train an RPN."""

from sdrpn.io.extras import needs

needs("datasets", "matplotlib", "pyarrow", "sklearn", extra="train", what="sdrpn.distill")

"""Self-distillation: the frozen model's own attention becomes labels, the labels train an RPN."""

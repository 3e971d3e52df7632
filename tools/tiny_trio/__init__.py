"""A second embedded model in the making: a finer grid and three kinds of questions."""

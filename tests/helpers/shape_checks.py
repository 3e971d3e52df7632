"""Checks arguments and results of the tensor code against the shapes in its signatures.

jaxtyping's pytest plugin (`--jaxtyping-packages` in pyproject.toml) puts this on every function of
the packages named there.
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float

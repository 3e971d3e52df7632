"""The suite. It mirrors the packages: tests/sdrpn/roi tests sdrpn/roi."""

from tests.helpers.shape_checks import checked as checked  # jaxtyping imports this package alone

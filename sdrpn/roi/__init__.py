"""From a RoI map to boxes, crops and crop tokens."""

"""sdrpn as an lmms-eval plugin: the model `llava_sdrpn`, the tasks, the record of what was seen."""

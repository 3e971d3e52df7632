"""lmms-eval tasks of this project; installed as `sdrpn_eval.tasks`."""

"""The ops that test_every_op.py runs, one file an op; each has a list CASES."""

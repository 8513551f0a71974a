"""Settings for trainings whose subject does not matter: without what the default does beside the steps.

Which is two thirds of a run of three steps on the embedded base. tests/test_cli.py trains as everybody does.
"""

# Sixteen more pictures, and a look at each before the first step.
BARE = {"background_augmentation": False, "auto_mask": False}
QUICK = {**BARE, "max_bytes": 0, "train_batch_size": 1}
FLAGS = ["--no-background_augmentation", "--no-auto_mask", "--max_bytes", "0", "--train_batch_size", "1"]  # the same

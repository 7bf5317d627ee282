"""The terms of the objective, one small file each; every one is invariant to the number of processes."""

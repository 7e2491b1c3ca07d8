"""The call signatures of other projects on our ops: change the import, keep the code."""

"""What ``eosin eval`` does: a module for those that are asked alike."""

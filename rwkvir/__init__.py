"""The `basicsr` command, and the seams through which it runs BasicSR's own training and test loop."""

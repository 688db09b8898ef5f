"""The verbs beside training, one file each; they never import each other."""

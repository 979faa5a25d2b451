"""New weights out of adapters: folds, blends, conversions, task vectors."""

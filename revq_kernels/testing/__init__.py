"""Public test helpers (`problems`, `exhaustive`); short because importing it loads neither."""

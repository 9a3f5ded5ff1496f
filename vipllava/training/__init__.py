"""Training with Lightning: the module, its optimizer, callbacks, and the wiring of a stage."""

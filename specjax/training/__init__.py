"""Training drafters: objectives, losses, packing, the optimiser, the mesh and the loop."""

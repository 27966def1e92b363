"""The mathematics: tensors in, tensors out. Which numbers exist (grid), what a layer's inputs weigh (hessian), how
codes are chosen (solvers). Nothing here knows a model, a file or a recipe."""

"""The mathematics: tensors in, tensors out. Nothing here knows a model, a file or a recipe.

Read in this order:
    grid         which numbers exist: codes, scales, zero points, and how a scale is chosen
    hessian      what the calibration text says of a layer's inputs, in one matrix; its damping and its factor
    solvers      how codes are chosen: rtn, then gptq with error propagation, then refine
    curvature    what the model's predictions say of a layer's outputs; solvers.two_sided uses it
    sensitivity  how far a scheme would move the predictions, and knapsack: which scheme each layer gets within a size
    training     scales, norms and biases by gradients of the whole model, when the codes are chosen
    matmul       at which precision and by which library matrices are multiplied
    histograms   what the report draws of the worst layers

Shape suffixes stand at the end of a tensor's name, one letter for each dimension: weight_OI is [out_features,
in_features]. Each file begins with its legend.
"""

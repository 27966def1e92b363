"""One block's work: inputs of its linears, Hessians, solve, dequantized weights set back; snapshots between blocks."""

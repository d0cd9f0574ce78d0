"""Quantizers, one file each (numpy only): weights in, packed integers and scales out, tensor by
tensor. ``rtn``, ``mse`` and ``hqq`` need no data, ``gptq`` the Hessian of the layer's inputs.
``awq`` and ``smoothquant`` give factors that are folded into the weights before."""

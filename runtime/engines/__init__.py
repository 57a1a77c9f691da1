"""TensorRT engines: built from a bundle's ONNX graphs, proven, kept beside a sidecar, refitted.

`product` finds TensorRT and the GPU, `build` makes a plan, `achieved` reads what became of it, the self-test compares
its answers with fp32, `sidecar` remembers all of it, `refit` exchanges what learning changes, `memory`, `cuda_graph`
and `engine_session` run it, `engine_cache` decides which is needed. Nothing here is imported before it is asked for.
"""

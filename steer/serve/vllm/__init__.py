"""vLLM as an engine: `taps` places sliders inside of its compiled model, `engine` writes the texts of `steer serve`.

Nothing else in steer imports this folder before it is asked for, since vLLM is an optional package.
"""

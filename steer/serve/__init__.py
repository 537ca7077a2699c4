"""`steer serve`: the OpenAI-compatible server, and the engine that writes many replies at once for it.

A request passes through these files in this order: `app` (routes), `schemas` (the body is parsed), `prompts` and
`steering` (prompt, sampler and sliders), `replies` (jobs are made), `writing` (jobs are submitted to `engine`, whose
implementation is `batching`), `texts` (tokens become text), `openai_json` (text becomes JSON).
"""

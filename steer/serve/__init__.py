"""`steer serve`: the OpenAI-compatible server, and the engine that writes many replies at once for it.

A request passes through these files in this order: `limits` (host, key and size), `server` (routes), `requests`
(body, prompt and sampler), `steering` (sliders), `replies` (jobs are made), `writing` (jobs are submitted to `engine`,
whose implementation is `batching`; tokens become text), `openai_json` (text becomes JSON).
"""

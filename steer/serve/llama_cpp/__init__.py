"""llama.cpp behind `steer serve`: the LoRAs of a running llama-server as sliders (`adapters`), and the engine."""

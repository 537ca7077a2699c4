"""The Streamlit view of a chat with sliders. State and logic live in `steer.chat`."""

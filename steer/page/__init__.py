"""The Streamlit page of `steer ui`. `shell` draws the page, `parts` its parts; all state is in `steer.chat`."""

"""The page from a checkout: `streamlit run app.py -- MODEL` does what `steer ui MODEL` does, with the same options of
Streamlit's, which stand in `.streamlit`."""

from steer.cli.page import start

start()

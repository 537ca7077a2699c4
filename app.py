"""The page from a checkout: `streamlit run app.py -- MODEL` does what `steer ui MODEL` does."""

from steer.cli.page import start

start()

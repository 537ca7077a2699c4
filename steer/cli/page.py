"""The script that streamlit runs for `steer ui`: it draws the page of `steer.page.shell`."""

from __future__ import annotations

from steer.cli.common import print_notices
from steer.page.shell import main


def start() -> None:
    """Draw the page once; streamlit runs this script again for every change."""
    print_notices()
    main()


if __name__ == "__main__":  # streamlit runs scripts under this name
    start()

"""The slider chat in a browser: `steer ui MODEL`, or `streamlit run app.py -- MODEL`.

`steer ui --server URL` talks to a model that `steer serve` runs. The parts of the page are in `steer/page`.
"""

from __future__ import annotations

from steer.cli_common import print_notices
from steer.page.shell import main

print_notices()
main()

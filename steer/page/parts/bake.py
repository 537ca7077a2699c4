"""The part "Bake": which sliders can be baked into a checkpoint or adapter, the running bake, and its certificate."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.costs import bake_cost
from steer.chat.jobs import BakePlan, BakingJob, plan
from steer.page.drawing import markdown
from steer.page.guard import button, draw_job, watch
from steer.page.parts import cost

POLL = 0.5


def draw(chat: Chat) -> None:
    """Draw the plan, and the job that carries it out in a separate process (`steer.chat.jobs`)."""
    job: BakingJob | None = st.session_state.get("baking")
    if job is not None:
        watch(_job, chat, job, running=lambda: job.running, every=POLL)
        if job.running:
            return
    st.caption(
        "Baking writes the sliders as they stand into a copy of the model, which then answers so without them. An "
        "adapter is a small file that does the same beside the model."
    )
    form = st.segmented_control("Form", ["checkpoint", "adapter"], default="checkpoint", required=True, key="form")
    bake_plan = plan(chat.model, chat.profile("baked"), "adapter" if form == "adapter" else "checkpoint")
    for verdict in bake_plan.verdicts:
        icon = ":material/check_circle:" if verdict.ok else ":material/cancel:"
        how = "" if verdict.operation == "add" else f" {verdict.operation}"
        st.markdown(f"{icon} **{markdown(verdict.slider)}**{how}: {markdown(verdict.reason)}")
    if bake_plan.why:
        st.warning(markdown(bake_plan.why))
    out = st.text_input("Folder to write", str(_free(Path.cwd() / "baked")), key="bake out").strip()
    with st.container(horizontal=True):
        button("Bake", lambda: _start(bake_plan, out), type="primary", disabled=not bake_plan.possible or not out)
        allowed = bake_plan.without_refused()
        if not bake_plan.possible and allowed.possible:
            button("Bake what can be", lambda: _start(allowed, out))


def _start(plan: BakePlan, out: str) -> None:
    st.session_state["baking"] = plan.start(out)


def _free(place: Path) -> Path:
    """Return a folder that does not exist: `place`, or `place-2` and so on."""
    tried = (place if number == 1 else place.with_name(f"{place.name}-{number}") for number in count(1))
    return next(p for p in tried if not p.exists())


def _job(chat: Chat, job: BakingJob) -> None:
    if not draw_job(job, "Baking", "cancel bake", lines=5) and job.certificate is not None:
        out = job.out
        assert out is not None
        st.success(f"Written: {markdown(str(out))}")
        if job.plan.form == "checkpoint":
            cost.ask(lambda: bake_cost(chat.model, out), "cost of bake")
        with st.expander("Certificate"):
            st.json(job.certificate, expanded=1)
        data = json.dumps(job.certificate, indent=2)
        st.download_button("Download the certificate", data, "steer_certificate.json", on_click="ignore")

"""Chats with sliders, for the terminal and the page: conversations, writers, comparisons, readings. No Streamlit.

`session` is the public chat of a script; `terminal` runs it as `steer chat`. The page (`steer.page`) uses `chat.Chat`:
a conversation tree whose replies a background thread writes (`writer`), with a model in this process (`local`) or
behind a server (`remote`).
"""

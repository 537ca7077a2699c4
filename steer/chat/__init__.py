"""What the chat page shows and does, without the page: conversations, their writers, sliders, comparisons, readings."""

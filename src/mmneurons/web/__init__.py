"""The web app: click a word, see its neurons, edit, undo. It needs the extra `app` (Gradio).

The folder is not called `app`: it would hide the function `mmneurons.app`.
"""

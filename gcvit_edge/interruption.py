"""Being told to end, where that was lost.

Python raises KeyboardInterrupt wherever the main thread is just then, which may be where nothing can be raised (a destructor, a callback
of C code) or inside a library's `except:`. So the command line sets `interrupted` too, and what was lost is raised again at the next
unit or step of progress.
"""

from threading import Event, current_thread, main_thread

interrupted = Event()


def raise_interruption() -> None:
    """Raises KeyboardInterrupt in the main thread if the command line was told to end."""
    if interrupted.is_set() and current_thread() is main_thread():
        raise KeyboardInterrupt

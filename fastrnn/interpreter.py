"""Which interpreters are served: the main one, with the GIL. Looked at before torch is imported.

torch holds its classes once a process. Imported in a second interpreter it fails half way, with errors that name
nothing, and may end the process later; or it waits without end, where that interpreter is the first to import it.
"""

import sys

SUB_INTERPRETER = "fastrnn: expected the main interpreter, got a sub-interpreter, of which torch serves none"


def check_interpreter() -> None:
    """Raises ImportError in a sub-interpreter."""
    try:
        import ctypes
    except ImportError as error:  # Python 3.12 lets no interpreter with a GIL of its own import ctypes
        if "subinterpreter" not in str(error):
            raise
        raise ImportError(SUB_INTERPRETER) from error
    state = ctypes.PYFUNCTYPE(ctypes.c_void_p)
    own, main = (state((f"PyInterpreterState_{name}", ctypes.pythonapi))() for name in ("Get", "Main"))
    if own != main:
        raise ImportError(SUB_INTERPRETER)


def check_gil() -> None:
    """Raises ImportError where the GIL is off, with which a call holds its weights together while it takes them.

    To be asked when the extension module has been loaded: that does not say that it could do without, and so a
    free-threaded Python has switched the GIL on, unless it was told not to.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise ImportError("fastrnn: expected Python's GIL, which is off: start without PYTHON_GIL=0 and -X gil=0")

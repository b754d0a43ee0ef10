"""`miles migrate`: reads a launch script of miles or slime, without running it, and writes the command for here.

`shell_script` and `python_script` evaluate what of a script leads to its command line (`launch`) and leave open what
only a run of it would know (`open_values`); `translation` sorts the flags of that line, `command` prints the result.
"""

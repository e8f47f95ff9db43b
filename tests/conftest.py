import signal

# A shell's background job is born with Ctrl-C ignored, and passes that on to every command that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

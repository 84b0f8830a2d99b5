"""The measurement rig: forwarders side by side, each between its own guest and its own far server.

    cage          namespaces of our own, so that nothing is left behind
    network       one network namespace, and commands in it
    site          the three namespaces of one backend: guest, host, far
    backends      what joins guest and host: hythe, its peers, and the bounds
    programs      where the programs are that take part
    ends          the servers and clients at both ends
    measurements  what is measured, one function a metric
    processes     what a forwarder costs: processor time and memory
    noise         what else the machine did meanwhile
    rounds        the order of the runs, and what is noted about each
    machine       the machine, as far as it explains numbers
    report        Markdown and JSON from runs
    histogram     latencies as text
    stacks        a flame graph from the kernel's samples

Python's standard library only.
"""

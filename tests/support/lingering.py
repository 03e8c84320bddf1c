"""A descriptor that is slow to close: a peer that gets the last copy waits for it."""

#: The text of functions for procedures and programs: `pass_lingering(sockets)` passes such a descriptor by each socket.
LINGERING = '''
import os, socket, stat, struct

def lingering():
    """Return a socket whose last close takes 600 s: its peer does not read what it has sent."""
    listener = socket.create_server(("127.0.0.1", 0))
    connection = socket.create_connection(listener.getsockname())
    connection.setblocking(False)
    try:
        while True:
            connection.send(bytes(65536))
    except BlockingIOError:
        pass
    connection.setblocking(True)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
    return connection, listener, listener.accept()[0]

def unix_sockets():
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                one = socket.socket(fileno=os.dup(number))
                if one.family == socket.AF_UNIX:
                    yield one
        except OSError:
            pass

def pass_lingering(sockets, data=b"{"):
    """Pass it and close the own copy; return how many sockets have accepted it, and what keeps its peer open."""
    connection, *kept = lingering()
    passed = 0
    for one in sockets:
        try:
            socket.send_fds(one, [data], [connection.fileno()])
            passed += 1
        except OSError:
            pass
    if passed:
        connection.close()
    return passed, kept, connection
'''

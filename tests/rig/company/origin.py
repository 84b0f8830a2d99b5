"""Servers that are reached through a proxy alone: HTTP and HTTPS, with what curl, git, apt and a puller of images ask for.

usage: origin.py DIRECTORY http ADDRESS...      at ports 80 and 443
       origin.py DIRECTORY websocket ADDRESS    an echo of messages

DIRECTORY has server.pem and server.key; below files/ is what is served as it is, below git/ are bare repositories. Each
request is a line of JSON in DIRECTORY/requests, written before it is answered.
"""

import asyncio
import hashlib
import http.server
import json
import os
import pathlib
import socket
import ssl
import subprocess
import sys
import threading

DIRECTORY = pathlib.Path(sys.argv[1])
LAYER = hashlib.shake_128(b"a layer of an image").digest(1_000_000)
DIGEST = "sha256:" + hashlib.sha256(LAYER).hexdigest()
MANIFEST = json.dumps({"schemaVersion": 2, "layers": [{"digest": DIGEST, "size": len(LAYER)}]}).encode()
LOCK = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # What is answered by many small writes is sent at once.
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def note(self):
        tls = isinstance(self.connection, ssl.SSLSocket)
        entry = {
            "line": self.requestline,
            "headers": [[name.lower(), value] for name, value in self.headers.items()],
            "tls": self.connection.version() if tls else "",
        }
        with LOCK, open(DIRECTORY / "requests", "a") as log:
            log.write(json.dumps(entry) + "\n")

    def body(self):
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def answer(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def any_method(self):
        self.note()
        body = self.body()
        path = self.path.split("?")[0]
        if path.startswith("/git/"):
            self.git(path, body)
        elif path.startswith("/v2/") or path.startswith("/blobs/") or path == "/token":
            self.registry(path)
        elif path == "/echo":
            self.answer(body)
        elif path == "/chunks":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"".join(b"5\r\nchunk\r\n" for _ in range(1000)) + b"0\r\n\r\n")
        elif (file := (DIRECTORY / "files" / path.lstrip("/"))).is_file():
            self.ranged(file.read_bytes())
        elif path == "/":
            self.answer(f"hello from {self.headers['host']}\n".encode())
        else:
            self.answer(b"nothing is here\n", 404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = any_method

    def ranged(self, content):
        """RFC 9110, 14.2, for `bytes=FROM-` alone."""
        asked = self.headers.get("range", "")
        if not asked.startswith("bytes="):
            return self.answer(content, Accept_Ranges="bytes")
        start = int(asked[6:].split("-")[0])
        where = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.answer(content[start:], 206, Content_Range=where)

    def registry(self, path):
        """What `docker pull` asks: the realm, a token, the manifest, and layers that lie somewhere else."""
        if path == "/token":
            return self.answer(b'{"token": "a-token"}', Content_Type="application/json")
        if path.startswith("/blobs/"):
            return self.ranged(LAYER)
        if self.headers.get("authorization") != "Bearer a-token":
            realm = f'Bearer realm="https://{self.headers["host"]}/token",service="registry"'
            return self.answer(b"{}", 401, WWW_Authenticate=realm)
        if path == "/v2/":
            return self.answer(b"{}", Docker_Distribution_API_Version="registry/2.0")
        if path == "/v2/image/manifests/latest":
            kind = "application/vnd.docker.distribution.manifest.v2+json"
            return self.answer(MANIFEST, Content_Type=kind)
        if path == f"/v2/image/blobs/{DIGEST}":
            return self.answer(b"", 307, Location=f"https://blobs.origin.test/blobs/{DIGEST}")
        return self.answer(b"{}", 404)

    def git(self, path, body):
        """git-http-backend(1), as a CGI."""
        query = self.path.partition("?")[2]
        variables = {
            "GIT_PROJECT_ROOT": str(DIRECTORY / "git"),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH": os.environ["PATH"],
            "PATH_INFO": path.removeprefix("/git"),
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("content-type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "REMOTE_USER": "somebody",
            "REMOTE_ADDR": "192.0.2.1",
        }
        if encoding := self.headers.get("content-encoding"):
            variables["HTTP_CONTENT_ENCODING"] = encoding
        if protocol := self.headers.get("git-protocol"):
            variables["GIT_PROTOCOL"] = protocol
        backend = ["/usr/bin/git", "-c", "safe.directory=*", "http-backend"]
        said = subprocess.run(backend, input=body, env=variables, stdout=subprocess.PIPE).stdout
        head, _, content = said.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        status = int(fields.pop("Status", "200").split()[0])
        self.answer(content, status, **{name.replace("-", "_"): value for name, value in fields.items()})


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, address, port):
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), Handler)
        threading.Thread(target=self.serve_forever).start()

    def handle_error(self, *_):
        # A client that goes early is its own affair.
        pass


class TlsServer(Server):
    def finish_request(self, request, client):
        # The handshake is made by the thread of the client.
        super().finish_request(tls().wrap_socket(request, server_side=True), client)


def tls():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(DIRECTORY / "server.pem", DIRECTORY / "server.key")
    return context


async def web_sockets(address):
    import websockets

    async def echo(socket):
        async for message in socket:
            await socket.send(message)

    plain = websockets.serve(echo, address, 80, max_size=None)
    secure = websockets.serve(echo, address, 443, ssl=tls(), max_size=None)
    async with plain, secure:
        await asyncio.Future()


if sys.argv[2] == "websocket":
    asyncio.run(web_sockets(sys.argv[3]))
else:
    for address in sys.argv[3:]:
        Server(address, 80)
        TlsServer(address, 443)

"""A real S3 server on loopback, and a door in front of it that answers what a test wants for a while."""

import http.client
import http.server
import threading

from moto.server import ThreadedMotoServer

# What S3 answers: status, code, message.
ANSWERS = {
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "no such bucket": (404, "NoSuchBucket", "The specified bucket does not exist"),
    "no right": (403, "AccessDenied", "Access Denied"),
    "unknown key id": (403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
    "wrong secret": (403, "SignatureDoesNotMatch", "The request signature we calculated does not match."),
    "wrong region": (400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-west-1'"),
    "moved": (301, "PermanentRedirect", "The bucket must be addressed using the specified endpoint."),
}
HOP_BY_HOP = ("transfer-encoding", "connection", "content-length", "server", "date", "expect")


class Door:
    """An HTTP proxy in front of the S3 server; `answers(method, path)` names an answer of its own, or None."""

    def __init__(self):
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        self.server.start()
        self.answers = lambda method, path: None
        self.refused = 0
        self._door = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._door.daemon_threads = True
        threading.Thread(target=self._door.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._door.server_port}"

    def close(self):
        self._door.shutdown()
        self._door.server_close()
        self.server.stop()

    def _handler(door):
        host, port = door.server.get_host_and_port()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.body()
                name = door.answers(self.command, self.path)
                if name is not None:
                    door.refused += 1
                    status, code, message = ANSWERS[name]
                    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
                    self.reply(status, {"Content-Type": "application/xml"}, text.encode())
                    return
                onward = http.client.HTTPConnection(host, port, timeout=60)
                passed = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
                onward.request(self.command, self.path, body or None, passed)
                response = onward.getresponse()
                content = response.read()
                headers = {name: value for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP}
                length = response.getheader("Content-Length") if self.command == "HEAD" else None
                self.reply(response.status, headers, content, length)
                onward.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

            def body(self):
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                chunks = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():  # trailers
                    pass
                return b"".join(chunks)

            def reply(self, status, headers, content, length=None):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        return Handler

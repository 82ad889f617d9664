"""A website on this machine, with everything that crawlers trip over. It counts what it is asked for."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SUBJECTS = ("falcons", "harbours", "violins", "orchards", "glaciers", "lanterns", "saddles", "planets")
_SENTENCES = {
    "falcons": "Falcons hunt small birds above open country. They nest on cliffs and old towers. A pair returns to one ledge for years.",
    "harbours": "Harbours shelter ships from heavy weather. Dredgers keep the channel deep enough. Pilots board every large vessel outside.",
    "violins": "Violins are carved from spruce and maple. The varnish protects thin plates of wood. A bow of horsehair makes strings sound.",
    "orchards": "Orchards need bees when the blossom opens. Farmers prune the branches in late winter. Frost in May ruins a harvest.",
    "glaciers": "Glaciers grind rock into flour as they move. Meltwater carries it far down the valley. Lakes below turn milky blue.",
    "lanterns": "Lanterns once marked the doors of taverns. Keepers filled them with whale oil. Glass sheets stopped draughts from the street.",
    "saddles": "Saddles spread the weight of a rider. Leather must be oiled against cracking. A poor fit hurts the horse within hours.",
    "planets": "Planets shine by reflected sunlight alone. Astronomers weigh them by their moons. Dust between them glows at dusk.",
}
CHINESE = "图书馆位于城市的中心，建于一九五二年，藏书超过三十万册。" * 6
SCRIPTED = """<html lang="en"><head><title>Scripted</title></head><body><article id="a"></article><script>
fetch("http://10.0.0.1/inside").catch(() => 0).then(() => fetch("/data.json")).then(answer => answer.json()).then(found => {
  document.getElementById("a").innerHTML = "<h1>Scripted</h1><p>" + found.text + "</p><a href='/planets'>planets</a>";
});
</script></body></html>"""
LAST_MODIFIED = "Wed, 01 May 2024 10:00:00 GMT"


def article(title: str, text: str, links: tuple[str, ...] = (), charset: str = "utf-8") -> bytes:
    anchors = "".join(f'<p><a href="{link}">{link}</a></p>' for link in links)
    page = (
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head><body><nav>{anchors}</nav>'
        f"<article><h1>{title}</h1>" + "".join(f"<p>{text}</p>" for _ in range(2)) + "</article></body></html>"
    )
    return page.encode(charset)


FIXED = {
    "/robots.txt": (b"User-agent: *\nDisallow: /secret\n", "text/plain"),
    "/gbk": (article("图书馆", CHINESE, charset="gb18030"), "text/html; charset=utf-8"),
    "/manual.pdf": (b"%PDF-1.4\n%%EOF\n", "application/pdf"),
    "/scripted": (SCRIPTED.encode(), "text/html"),
    "/data.json": (json.dumps({"text": _SENTENCES["glaciers"] * 2}).encode(), "application/json"),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: TrapServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        self.server.cookies.add(str(self.headers.get("Cookie")))
        self.server.reached_at.add(self.connection.getsockname()[0])
        try:
            self._answer(self.path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self, path: str) -> None:
        subject = path.strip("/").partition(".")[0]
        if path == "/":
            self._send(article("Contents", "This is a list of everything on the site.", self.server.links))
        elif subject in _SENTENCES:
            self._send(article(subject.title(), _SENTENCES[subject], ("/", "/falcons", "/copy")), etag=True)
        elif path == "/copy":
            self._send(article("Falcons", _SENTENCES["falcons"]))
        elif path == "/secret":
            self._send(article("Secret", "Nobody who keeps to robots.txt reads this page here at all."))
        elif path.startswith("/calendar/"):
            day = int(path.rpartition("/")[2])
            self._send(article(f"Day {day}", f"Entry of day {day}.", (f"/calendar/{day + 1}", f"/calendar/{day + 2}")))
        elif path in FIXED:
            self._send(*FIXED[path])
        elif "sitemap" in path:
            self._send(*self._sitemap(path))
        else:
            self._trap(path)

    def _sitemap(self, path: str) -> tuple[bytes, str]:
        """An index that names two lists, one of them packed; one page stands in both."""
        listed = {
            "/sitemap.xml": ("sitemapindex", "sitemap", ("one-sitemap.xml", "two-sitemap.xml.gz")),
            "/one-sitemap.xml": ("urlset", "url", ("falcons", "harbours")),
            "/two-sitemap.xml.gz": ("urlset", "url", ("harbours", "lanterns")),
        }
        root, entry, names = listed[path]
        entries = "".join(f"<{entry}><loc>{self.server.url}{name}</loc></{entry}>" for name in names)
        xml = f'<{root} xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{entries}</{root}>'.encode()
        return (gzip.compress(xml), "application/gzip") if path.endswith(".gz") else (xml, "application/xml")

    def _trap(self, path: str) -> None:
        if path.startswith("/loop"):
            self._redirect("/loop2" if path == "/loop" else "/loop")
        elif path == "/inside":
            self._redirect("http://10.0.0.1/admin")
        elif path == "/elsewhere":
            self._redirect("file:///etc/passwd")
        elif path == "/ten-gigabytes":
            self._endless(b"x" * 65536, 0.0, length=10_000_000_000)
        elif path == "/huge":
            self._endless(b"x" * 65536, 0.0)
        elif path == "/drip":
            self._endless(b"x", 0.2)
        else:
            self._send(b"broken", status=500 if path == "/broken" else 404)

    def _redirect(self, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.send_header("Content-Length", "0")
        self.send_header("Set-Cookie", "visitor=1")
        self.end_headers()

    def _endless(self, piece: bytes, pause: float, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(400):
            self.wfile.write(piece)
            self.wfile.flush()
            self.server.sent[self.path] += len(piece)
            time.sleep(pause)
        self.close_connection = True

    def _send(self, body: bytes, kind: str = "text/html", status: int = 200, etag: bool = False) -> None:
        if etag and self.headers.get("If-None-Match") == '"1"':
            self.server.unchanged += 1
            status, body = 304, b""
        time.sleep(self.server.pause)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if etag:
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", LAST_MODIFIED)
        self.end_headers()
        self.wfile.write(body)


class TrapServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, links: tuple[str, ...], pause: float, host: str) -> None:
        super().__init__((host, 0), _Handler)
        self.links, self.pause = links, pause
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.cookies: set[str] = set()
        self.reached_at: set[str] = set()
        self.unchanged = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


@contextmanager
def trap_site(links: tuple[str, ...], pause: float = 0.0, host: str = "127.0.0.1") -> Iterator[TrapServer]:
    server = TrapServer(links, pause, host)
    thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

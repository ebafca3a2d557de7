"""A page of HTML as a test looks at it."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps text by section, rows of tables, and what would be loaded."""

    def __init__(self, path):
        super().__init__()
        self.path, self.open, self.loaded, self.rows, self.sections, self.tags = path, [], [], [], {}, []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.loaded += [attributes[name] for name in ("src", "href", "srcset", "data") if name in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.widths = []
        if tag == "tr":
            self.rows.append([])
            self.widths.append(0)
        if tag in ("td", "th"):
            self.rows[-1].append(["", attributes.get("class", "").split()])
            self.widths[-1] += int(attributes.get("colspan", 1))
        if tag == "h2":
            self.heading = ""

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag
        assert tag != "table" or len(set(self.widths)) == 1, "every row fills its table"

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.heading += data
        elif "section" in self.open:
            self.sections[self.heading] = self.sections.get(self.heading, "") + data
        if self.rows and self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1][0] += data

    def row(self, first, *more):
        (found,) = [r for r in self.rows if [c[0] for c in r[: 1 + len(more)]] == [first, *more]]
        return found

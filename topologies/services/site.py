"""A site on Django with its database (SQLite): GET, PUT and DELETE of /KEY, POST to count one more. A
thread for each connection, a transaction for each change. The answer repeats the request's X-Sequence.

The database lies in the directory that is given."""

import sys
from threading import Lock

import django
from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler
from django.core.servers import basehttp
from django.db import connection, models, transaction
from django.http import HttpResponse
from django.urls import re_path

settings.configure(
    SECRET_KEY="nothing here is secret",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    LOGGING_CONFIG=None,
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": f"{sys.argv[1]}/site.sqlite3",
            "CONN_MAX_AGE": None,
            "OPTIONS": {"timeout": 60},
        }
    },
)
django.setup()

# SQLite lets one write at a time, and turns away who would read first and then write.
writing = Lock()


class Entry(models.Model):
    key = models.CharField(max_length=200, primary_key=True)
    value = models.BinaryField()

    class Meta:
        app_label = "site"


def change(key, to):
    """Replaces an entry's value by what `to` makes of it, in a transaction."""
    with writing, transaction.atomic():
        entry = Entry.objects.filter(key=key).first()
        value = to(bytes(entry.value) if entry else None)
        if value is None:
            Entry.objects.filter(key=key).delete()
        elif entry:
            Entry.objects.filter(key=key).update(value=value)
        else:
            Entry.objects.create(key=key, value=value)
    return value


def view(request, key):
    status, body = 204, b""
    if request.method == "GET":
        entry = Entry.objects.filter(key=key).first()
        status, body = (200, bytes(entry.value)) if entry else (404, b"there is none\n")
    elif request.method == "PUT":
        change(key, lambda _: request.body)
    elif request.method == "POST":
        status, body = 200, change(key, lambda value: b"%d" % (int(value or b"0") + 1))
    elif request.method == "DELETE":
        change(key, lambda _: None)
    answer = HttpResponse(body, status=status, content_type="application/octet-stream")
    answer["Content-Length"] = str(len(body))
    answer["X-Sequence"] = request.headers.get("X-Sequence", "")
    return answer


urlpatterns = [re_path("^(?P<key>.+)$", view)]

if Entry._meta.db_table not in connection.introspection.table_names():
    with connection.schema_editor() as editor:
        editor.create_model(Entry)

basehttp.WSGIRequestHandler.disable_nagle_algorithm = True
basehttp.WSGIRequestHandler.log_message = lambda *_: None
basehttp.run("0.0.0.0", 8080, WSGIHandler(), threading=True)

"""Settings of the demo shop.

The defaults describe a small production site: no debug mode, cached template loaders, persistent database
connections, quiet loggers. Everything that differs between the demo and the benchmark comes from the environment.
"""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

BASE_DIR = Path(__file__).resolve().parent.parent

# Served on loopback with made-up data; nothing here is worth signing with a real secret.
SECRET_KEY = os.environ.get("SHOP_SECRET_KEY", "demo-only-nothing-secret-is-signed-with-this")
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1", "localhost", "[::1]"]

INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.humanize",
    "shop",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

PROFILER_MIDDLEWARE = {
    "pyinstrument": "pyinstrument.middleware.ProfilerMiddleware",
    "cprofile": "shopsite.profiling.CProfileMiddleware",
}
if os.environ.get("SHOP_PROFILER"):
    MIDDLEWARE.insert(0, PROFILER_MIDDLEWARE[os.environ["SHOP_PROFILER"]])
PROFILE_DIR = os.environ.get("SHOP_PROFILE_DIR", "")
PYINSTRUMENT_PROFILE_DIR = PROFILE_DIR

ROOT_URLCONF = "shopsite.urls"
WSGI_APPLICATION = "shopsite.wsgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]


def database(url):
    """Turns `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST:PORT/NAME` into Django's dictionary."""
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        return {
            "ENGINE": "django.db.backends.sqlite3",
            # Three slashes are a relative path, four an absolute one.
            "NAME": unquote(parts.path)[1:],
            "OPTIONS": {"timeout": 10, "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"},
            "CONN_MAX_AGE": None,
        }
    if parts.scheme in ("postgres", "postgresql"):
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": unquote(parts.path).lstrip("/"),
            "USER": unquote(parts.username or ""),
            "PASSWORD": unquote(parts.password or ""),
            "HOST": parts.hostname or "",
            "PORT": parts.port or "",
            "CONN_MAX_AGE": None,
        }
    raise ValueError(f"DATABASE_URL: unknown scheme {parts.scheme!r}; use sqlite:/// or postgresql://")


DATABASES = {"default": database(os.environ.get("DATABASE_URL", f"sqlite:///{BASE_DIR / 'shop.sqlite3'}"))}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_TZ = True

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "ERROR"},
}

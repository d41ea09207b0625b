"""What belongs to a user for good: the uid of their files, and the images made for them."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, Select, and_, func, insert, or_, select, update

from ds01spawner.errors import LedgerError

from .part import SYSTEM, Part
from .records import ImageRecord, checked_name, tidy
from .tables import images, uids


class Uids(Part):
    """One uid per Hub user, given once, never to anybody else."""

    def uid_of(self, user: str, uid_range: tuple[int, int], taken: Callable[[int], bool]) -> int:
        """The uid of `user`; the first call gives one.

        A user keeps the uid even if the range changes later: the files have it.

        Args:
            uid_range: first and last uid that may be given.
            taken: True if the host uses that uid for something else; asked outside the transaction.

        Raises:
            LedgerError: every uid of the range is given or taken.
        """
        checked_name("user name", user)
        first, last = uid_range
        refused: set[int] = set()
        while True:
            with self._db.read() as connection:
                mine, candidate = _next_uid(connection, user, first, last, refused)
            if mine is not None:
                return mine
            if candidate is None:
                raise LedgerError(
                    f"No uid is left in {first}-{last} for {user}. Widen uid_range in the settings.",
                    facts={"uid_range": [first, last]},
                )
            if taken(candidate):
                refused.add(candidate)
                continue
            given = self._give_uid(user, candidate)
            if given is not None:
                return given

    def _give_uid(self, user: str, uid: int) -> int | None:
        """Write it down; None if another process was faster with that uid."""
        with self._db.write() as connection:
            mine = connection.scalar(select(uids.c.uid).where(uids.c.owner == user))
            if mine is not None:
                return int(mine)
            if connection.scalar(select(uids.c.owner).where(uids.c.uid == uid)) is not None:
                return None
            connection.execute(insert(uids).values(owner=user, uid=uid, given_at=self._now()))
            self._note(connection, SYSTEM, "uid.give", user, "first start", None, {"uid": uid})
            return uid


class Images(Part):
    """Images that were made here. Only their owner may start them."""

    def remember_image(self, record: ImageRecord, *, actor: str = SYSTEM) -> ImageRecord:
        """Write down an image after its commit; the same `ref` of the same owner is updated.

        Raises:
            LedgerError: the `ref` belongs to somebody else.
        """
        checked_name("user name", record.owner)
        checked_name("image", record.ref, longest=512)
        now = self._now()
        values = {
            "owner": record.owner,
            "image_id": checked_name("image id", record.image_id),
            "base_image": tidy(record.base_image, 512),
            "server_name": record.server_name,
            "size": record.size,
            "layers": record.layers,
            "kind": record.kind,
            "created_at": record.created_at or now,
            "last_used_at": record.last_used_at or now,
        }
        current = and_(images.c.ref == record.ref, images.c.removed_at.is_(None))
        with self._db.write() as connection:
            found = next(iter(_images(connection, select(images).where(current))), None)
            if found is None:
                connection.execute(insert(images).values(ref=record.ref, **values))
            elif found.owner != record.owner:
                raise LedgerError(f"The image {record.ref} belongs to another user; it was left alone.")
            else:
                connection.execute(update(images).where(current).values(values))
            old = {"image_id": found.image_id, "size": found.size} if found else None
            new = {"image_id": record.image_id, "size": record.size, "layers": record.layers, "kind": record.kind}
            self._note(connection, actor, "image.remember", record.ref, f"image of {record.owner}", old, new)
            return _images(connection, select(images).where(current))[0]

    def images_of(self, user: str, *, removed: bool = False) -> tuple[ImageRecord, ...]:
        """Images of one user, newest use first; with `removed=True` those that are gone as well."""
        query = select(images).where(images.c.owner == user)
        if not removed:
            query = query.where(images.c.removed_at.is_(None))
        with self._db.read() as connection:
            return _images(connection, query.order_by(images.c.last_used_at.desc(), images.c.id.desc()))

    def find_image(self, name: str) -> ImageRecord | None:
        """The image of that ref or image id, whoever owns it; None if it was not made here.

        An image id that several refs share gives the oldest: the first owner decides.
        """
        known = and_(or_(images.c.ref == name, images.c.image_id == name), images.c.removed_at.is_(None))
        with self._db.read() as connection:
            return next(iter(_images(connection, select(images).where(known).order_by(images.c.id).limit(1))), None)

    def touch_image(self, ref: str) -> None:
        """Note that a container was started from it."""
        current = and_(images.c.ref == ref, images.c.removed_at.is_(None))
        with self._db.write() as connection:
            connection.execute(update(images).where(current).values(last_used_at=self._now()))

    def forget_image(self, ref: str, reason: str, *, actor: str = SYSTEM) -> None:
        """Note that it was removed from Docker; its ref may be used again. Unknown refs are ignored."""
        current = and_(images.c.ref == ref, images.c.removed_at.is_(None))
        with self._db.write() as connection:
            if connection.execute(update(images).where(current).values(removed_at=self._now())).rowcount:
                self._note(connection, actor, "image.forget", ref, reason)


def _next_uid(
    connection: Connection, user: str, first: int, last: int, refused: set[int]
) -> tuple[int | None, int | None]:
    """(uid the user has, else None; next candidate, else None): above the highest given one, then any gap."""
    mine = connection.scalar(select(uids.c.uid).where(uids.c.owner == user))
    if mine is not None:
        return int(mine), None
    inside = uids.c.uid.between(first, last)
    highest = connection.scalar(select(func.max(uids.c.uid)).where(inside))
    for candidate in range(first if highest is None else int(highest) + 1, last + 1):
        if candidate not in refused:
            return None, candidate
    given = set(connection.scalars(select(uids.c.uid).where(inside))) | refused
    return None, next((uid for uid in range(first, last + 1) if uid not in given), None)


def _images(connection: Connection, query: Select[tuple[ImageRecord]]) -> tuple[ImageRecord, ...]:
    return tuple(ImageRecord(**row) for row in connection.execute(query).mappings())

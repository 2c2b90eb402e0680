"""The example users of a run's page: what the LLM read of each, and every ranking of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from palr_jax.evaluation import page, render
from palr_jax.evaluation.page import Html


def examples(details: Mapping[str, Any]) -> Html:
    """What opens to a user's history, profile and candidates, a user each."""
    found = details['examples']
    if found is None:
        return Html('<p>No LLM ranked in this run.</p>')
    config = details['config']
    text = (
        f'<p>{len(found["users"])} users drawn with the seed {found["seed"]} among the '
        f'{found["of"]:,} test users that the LLM ranked'
    )
    if config['ranking.skip_misses']:
        text += ', whose targets are among the candidates'
    text += (
        '; how well they are ranked played no part. A hit is a target among the first '
        f'{found["hit"]}; a place like 3–5 is shared by tied items.</p>\n'
    )
    if config['ranking.mode'] == 'generate':
        text += _of_written(listed=config['prompts.candidates'])
    for number, user in enumerate(found['users'], start=1):
        text += f'{_user(number, user, found)}\n'
    return Html(text)


def _of_written(listed: bool) -> str:
    if listed:
        return '<p>The LLM writes its best candidates; those it does not write share a place.</p>\n'
    return (
        '<p>The LLM names items of its own choice. A place that no item has is a line that names '
        'none; items that share a title share a place.</p>\n'
    )


def _user(number: int, user: Mapping[str, Any], found: Mapping[str, Any]) -> Html:
    systems, k = found['systems'], found['hit']
    told = ', '.join(f'{render.title(s)} {_hit(user["targets"][s])}' for s in systems)
    name, target = page.escape(user['user']), page.escape(user['target'])
    summary = Html(f'<strong>User {name}</strong>: {target} <small>{page.escape(told)}</small>')
    body = (
        f'<h3>History</h3>\n<p class="note">{_of_history(user)}</p>\n'
        f'<ol>{"".join(f"<li>{page.escape(title)}</li>" for title in user["history"])}</ol>\n'
        f'<h3>Profile</h3>\n<p>{page.escape(_profile(user["profile"]))}</p>\n'
        f'<h3>Target</h3>\n<p><strong>{target}</strong></p>\n'
    )
    places = [[render.title(s), *_target(user['targets'][s], k)] for s in systems]
    head = ['System', 'Place of the target', f'Among the first {k}']
    label = f'Target of user {user["user"]}'
    body += f'{page.table(head, places, left=3, label=label, wide=0)}\n'
    body += f'<h3>Candidates</h3>\n{_candidates(user, systems, k)}'
    return page.details(f'user-{number}', summary, body)


def _hit(target: Mapping[str, Any]) -> str:
    if target['hit'] in (0.0, 1.0):
        return 'hits' if target['hit'] else 'misses'
    return f'hits by a chance of {target["hit"]:.2f}'


def _target(target: Mapping[str, Any], k: int) -> list[str]:
    where = 'not ranked' if target['place'] is None else _place(target['place'])
    return [where, _hit(target)]


def _place(place: Sequence[int] | None) -> str:
    if place is None:
        return render.UNKNOWN
    first, last = place
    return f'{first:,}' if first == last else f'{first:,}–{last:,}'


def _of_history(user: Mapping[str, Any]) -> str:
    number, total = len(user['history']), user['items']
    if user['history_known']:
        return f'The {number} items of {total} that the prompt shows, oldest first.'
    return (
        f'The latest {number} items of {total}, oldest first; how many of them the prompt shows '
        'was not recorded.'
    )


def _profile(profile: Sequence[str] | None) -> str:
    if profile is None:
        return 'Not recorded.'
    return ', '.join(profile) or 'None.'


def _candidates(user: Mapping[str, Any], systems: Sequence[str], k: int) -> Html:
    body = []
    for candidate in user['candidates']:
        title = page.escape(candidate['title'])
        if candidate['target']:
            title = f'<mark>{title}</mark> (the target)'
        places = [_place(candidate['places'].get(system)) for system in systems]
        body.append([Html(title), *places])
    head = ['Item', *map(render.title, systems)]
    label = f'Places of the candidates of user {user["user"]}'
    text = page.table(head, body, left=1, label=label, wide=0)
    if user['left_out']:
        text += (
            f'\n<p class="note">{user["left_out"]:,} more that are among the first {k} of no '
            'ranking.</p>'
        )
    return Html(text)
